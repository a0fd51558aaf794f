import pytest

from janus_ray.errors import CheckpointError
from janus_ray.model_folder import weights_id


def test_the_weights_id_is_of_content_and_nothing_else(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    for folder in (first, second):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights")
        (folder / "config.json").write_text("{}")
    (second / "manifest.json").write_text('{"finished_at": "today"}')
    assert weights_id(first) == weights_id(second)
    assert len(weights_id(first)) == 16
    (second / "chat_template.jinja").write_text("{{ bos_token }}")
    assert weights_id(first) != weights_id(second)
    (second / "chat_template.jinja").unlink()
    (second / "model.safetensors").write_bytes(b"weightt")
    assert weights_id(first) != weights_id(second)
    with pytest.raises(CheckpointError, match="no such folder"):
        weights_id(tmp_path / "absent")
