import hashlib

import pytest

import emaudit


def test_what_is_in_a_file(directions, file, vectors):
    assert (directions.width, directions.layers, directions.site) == (24, [1, 2], "resid_post")
    assert directions.verified and directions.digest == hashlib.sha256(file).hexdigest()
    assert directions.manifest["model"]["name"] == "a test"
    assert (directions.causal(1), directions.content(1), directions.signed) == ("untested", "untested", None)
    for layer, (direction, mean) in vectors.items():
        assert (directions.direction(layer) == direction).all()
        assert (directions.aligned_mean(layer) == mean).all()


def test_opening_checks_what_it_is_told_to(tmp_path, file):
    path = tmp_path / "directions.safetensors"
    path.write_bytes(file)
    digest = hashlib.sha256(file).hexdigest()
    for mapped in (False, True):
        assert emaudit.Directions.open(path, expected_digest=digest, mapped=mapped).digest == digest
    unchecked = emaudit.Directions.open(str(path), verify=False)
    assert not unchecked.verified and unchecked.digest is None

    key = "RWQf6LRCGA9i53mlYecO4IzT51TGPpvWucNSCh1CBM0QTaLn73Y7GFO3"
    refusals = [
        (lambda: emaudit.Directions.open(path, expected_digest="0" * 64), 7, "DigestMismatch"),
        (lambda: emaudit.Directions.open(path, expected_digest="no digest"), 1, "InvalidArgument"),
        (lambda: emaudit.Directions.open(path, trusted_key=key), 17, "Unsigned"),
        (lambda: emaudit.Directions.open(path, trusted_key=key, signature=b"scribble"), 18, "BadSignature"),
        (lambda: emaudit.Directions.open(tmp_path / "none"), 2, "Io"),
        (lambda: emaudit.Directions.from_bytes(file[:-4]), 4, "Truncated"),
        (lambda: emaudit.Directions.from_bytes(b"This is a note, and not a direction file."), 3, "NotADirectionFile"),
        (lambda: emaudit.Directions.from_bytes(file).direction(7), 11, "LayerNotFound"),
        (lambda: emaudit.to_bytes({"model": 1}, {}), 1, "InvalidArgument"),
    ]
    for refused, status, name in refusals:
        with pytest.raises(emaudit.Error) as raised:
            refused()
        assert (raised.value.status, raised.value.status_name) == (status, name)
        assert len(str(raised.value)) > 20


def test_another_model_is_refused(directions):
    model = {
        "architecture": "llama", "hidden_size": 24, "n_layers": 4, "vocab_size": 1000, "tokenizer_digest": "1" * 64,
    }
    assert directions.check_model(**model) == "variant"
    assert directions.check_model(**model, weights_digest="2" * 64, quantization="f32") == "exact"
    others = [
        ("architecture", "qwen2"), ("hidden_size", 25), ("n_layers", 5), ("vocab_size", 1001),
        ("tokenizer_digest", "5" * 64), ("site", "final_norm"),
    ]
    for field, other in others:
        with pytest.raises(emaudit.Error, match="another model") as raised:
            directions.check_model(**(model | {field: other}))
        assert raised.value.status == 9
    with pytest.raises(emaudit.Error, match="no site"):
        directions.check_model(**model, site="mlp_out")
