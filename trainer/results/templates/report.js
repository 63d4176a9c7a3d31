// Shows of every model the map of the class that was chosen. Without it the true class is shown.
const choice = document.getElementById("explained");
function show() {
  for (const maps of document.querySelectorAll(".maps")) {
    const own = { true: maps.dataset.true, says: maps.dataset.says };
    const wanted = own[choice.value] ?? choice.value;
    for (const map of maps.children) map.hidden = map.dataset.class !== wanted;
  }
}
choice.addEventListener("change", show);
document.getElementById("chooser").hidden = false;
show();
