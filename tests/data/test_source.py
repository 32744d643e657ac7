import io

import numpy as np
from PIL import Image

from kd_hf.data.opening import open_source
from kd_hf.recipe.config import DataConfig
from tests.data.conftest import contents, refused


def test_digits(digits):
    from sklearn.datasets import load_digits

    train, test = open_source(digits, "train"), open_source(digits, "eval")
    assert (len(train), len(test)) == (1078, 719)
    assert train.class_names == test.class_names == tuple("0123456789")
    for source in (train, test):
        share = np.bincount(source.labels()) / np.bincount(load_digits().target)
        assert np.ptp(share) < 0.02
    assert not {data for data, _ in contents(train)[:300]} & {data for data, _ in contents(test)}
    data, label = train.read(0)
    image = Image.open(io.BytesIO(data))
    assert (image.format, image.mode, image.size) == ("PNG", "RGB", (32, 32))
    originals = np.rint(load_digits().images[load_digits().target == label] * 255 / 16).astype(np.uint8)
    large = [Image.fromarray(one).resize((32, 32), Image.Resampling.BICUBIC) for one in originals]
    assert any(np.array_equal(np.asarray(image), np.asarray(one.convert("RGB"))) for one in large)
    assert contents(open_source(digits, "train"))[:20] == contents(train)[:20]


def test_unknown_builtin():
    refused(DataConfig(path="builtin:digit"), "data.path: unknown built-in data .* Did you mean 'builtin:digits'")
