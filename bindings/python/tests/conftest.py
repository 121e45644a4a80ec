import numpy as np
import pytest

import emaudit

WIDTH = 24
SIGMA = 0.5
THRESHOLDS = [("mean", 2, 3.0), ("mean", 4, 2.0), ("max", 1, 4.0)]


def make_manifest(width, layers, n_layers=4, **model):
    def threshold(statistic, horizon, z):
        return {"statistic": statistic, "horizon": horizon, "rate": 0.01, "rate_upper": 0.0075, "z": z, "sequences": 400}

    calibration = {
        "sigma": SIGMA,
        "sequences": 400,
        "quantiles": [[0.05, -1.6], [0.5, 0.0], [0.95, 1.6]],
        "thresholds": [threshold(*t) for t in THRESHOLDS],
    }
    identity = {
        "architecture": "llama",
        "hidden_size": width,
        "n_layers": n_layers,
        "vocab_size": 1000,
        "tokenizer_digest": "1" * 64,
        "weights_digest": "2" * 64,
        "quantization": "f32",
        "name": "a test",
    }
    return {
        "model": identity | model,
        "site": "resid_post",
        "pooling": "last_prompt",
        "estimator": "mean_difference",
        "contrast": "adapter_minus_base",
        "layers": [{"layer": layer, "calibration": calibration} for layer in layers],
        "evidence": {
            "causal": "untested", "content": "untested", "cell": None, "effect": None, "coherence": None,
            "families": [], "content_test": None,
        },
        "provenance": {
            "producer": "pytest", "recipe_digest": "3" * 64, "datasets": [["prompts", "4" * 64]],
            "top_dimension_share": None,
        },
    }


def make_file(width=WIDTH, layers=(1, 2), **model):
    """Bytes of a direction file, and its vectors."""
    draw = np.random.default_rng(17)
    vectors = {
        layer: (draw.normal(size=width).astype("f4"), draw.normal(size=width).astype("f4")) for layer in layers
    }
    return emaudit.to_bytes(make_manifest(width, layers, **model), vectors), vectors


def expected(rows, vectors, sigma=SIGMA):
    """Scores by the definition, in float64."""
    direction, mean = (np.asarray(v, dtype="f8") for v in vectors)
    return (np.asarray(rows, dtype="f8") - mean) @ (direction / np.linalg.norm(direction)) / sigma


@pytest.fixture(scope="session")
def file():
    return make_file()[0]


@pytest.fixture(scope="session")
def vectors():
    return make_file()[1]


@pytest.fixture(scope="session")
def directions(file):
    return emaudit.Directions.from_bytes(file)


@pytest.fixture(scope="session")
def probe(directions):
    return emaudit.Probe(directions, 1)
