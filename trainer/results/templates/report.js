// Show each model's map of the chosen class. Without this script the maps of the true class are shown.
const choice = document.getElementById("explained");
function show() {
  for (const maps of document.querySelectorAll(".maps")) {
    const own = { true: maps.dataset.true, says: maps.dataset.says };
    const chosen = own[choice.value] ?? choice.value;
    for (const map of maps.children) map.hidden = map.dataset.class !== chosen;
  }
}
choice.addEventListener("change", show);
document.getElementById("chooser").hidden = false;
show();
