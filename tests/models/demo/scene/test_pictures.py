import numpy as np
from PIL import Image

from models.demo.scene import pictures


def test_the_same_scene_is_rendered_again_and_another_index_is_another(tmp_path):
    one, again, other = (
        pictures.write(tmp_path / name, views=2, size=56, index=index) for name, index in (("a", 0), ("b", 0), ("c", 1))
    )
    assert [path.name for path in one] == ["view-0.png", "view-1.png"]
    first, second, third = (np.asarray(Image.open(paths[1])) for paths in (one, again, other))
    assert first.shape == (56, 56, 3)
    assert np.array_equal(first, second)
    assert np.abs(first.astype(int) - third).mean() > 5
