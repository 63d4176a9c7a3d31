"""What explaining a batch promises: the maps of a `Forward`, as arrays, for any classes and ε."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline import EXPLAINERS, Classifier, Forward, ModelError, RelevanceError, build_network
from pipeline.batch import explain_batch
from pipeline.device import as_input, as_mask

CPU = torch.device("cpu")
CLASSES = np.array([[2, 0], [0, 0], [1, 3], [3, 2]])
EPSILON = np.array([[0.1, 0.5], [0.2, 0.02], [1.0, 0.1], [0.3, 0.3]], np.float32)


@pytest.fixture
def model() -> Classifier:
    torch.manual_seed(0)
    network, _ = build_network("small-cnn", 4, (3, 12, 12), free_of_biases=False)
    return Classifier(network).eval()


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (4, 3, 12, 12), np.uint8)


HERE = [name for name, explainer in EXPLAINERS.items() if explainer.stride in (None, 4)]  # in images of 12×12


@pytest.mark.parametrize("explainer", HERE)
def test_maps_logits_and_features_are_those_of_a_forward_pass(explainer, model, images):
    batch = explain_batch(model, images, None, CLASSES, EPSILON, explainer=explainer, device=CPU, features=True)
    for draw in range(2):
        forward = Forward(model, as_input(images, CPU), explainer)
        maps = forward.maps(torch.from_numpy(CLASSES[:, draw]), torch.from_numpy(EPSILON[:, draw])).detach().numpy()
        assert np.array_equal(batch.maps[:, draw], maps)
    assert np.array_equal(batch.logits, forward.logits.detach().numpy())
    assert np.array_equal(batch.features, forward.features.detach().numpy())
    assert np.array_equal(batch.classes, CLASSES)
    assert {values.dtype for values in (batch.maps, batch.logits, batch.features)} == {np.dtype(np.float32)}


def test_one_epsilon_is_that_of_all_maps(model, images):
    one, each = (
        explain_batch(model, images, None, CLASSES, epsilon, explainer="flex", device=CPU)
        for epsilon in (0.1, np.full((4, 2), 0.1))
    )
    assert np.allclose(one.maps, each.maps, rtol=1e-5, atol=1e-8)
    assert one.features is None


def test_classes_may_be_chosen_by_the_logits(model, images):
    def predicted(logits: np.ndarray) -> np.ndarray:
        return logits.argmax(1)[:, None]

    batch = explain_batch(model, images, None, predicted, 0.1, explainer="flex", device=CPU)
    assert batch.maps.shape == (4, 1, 3, 12, 12)
    assert np.array_equal(batch.classes[:, 0], batch.logits.argmax(1))
    told = explain_batch(model, images, None, batch.classes, 0.1, explainer="flex", device=CPU)
    assert np.array_equal(batch.maps, told.maps)


def test_masks_are_given_to_a_model_that_takes_them(model, images):
    masked = Classifier(model.network, "mask").eval()
    masks = np.zeros((4, 1, 12, 12), np.uint8)
    masks[:, :, 3:8, 2:9] = 255
    batch = explain_batch(masked, images, masks, CLASSES, 0.1, explainer="flex", device=CPU)
    assert batch.maps.any()
    assert not (batch.maps * (masks == 0)[:, None]).any()
    expected = Forward(masked, as_input(images, CPU), masks=as_mask(masks, CPU)).logits
    assert np.array_equal(batch.logits, expected.detach().numpy())
    with pytest.raises(ModelError, match="masks"):
        explain_batch(masked, images, None, CLASSES, 0.1, explainer="flex", device=CPU)


def test_the_model_keeps_its_parameters_without_gradients(model, images):
    explain_batch(model, images, None, CLASSES, EPSILON, explainer="flex", device=CPU)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_unknown_explainer_is_refused(model, images):
    with pytest.raises(RelevanceError, match="choose one of flex"):
        explain_batch(model, images, None, CLASSES, 0.1, explainer="lrp", device=CPU)
