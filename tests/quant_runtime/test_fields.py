import pytest

from quant_runtime.fields import build
from quant_runtime.methods import METHODS, QuaRot, Rtn, SmoothQuant
from quant_runtime.sparsity import POLICIES
from quant_runtime.sparsity.topk import TopK


@pytest.mark.parametrize(
    ("table", "name", "given", "made"),
    [
        (METHODS, "rtn", {}, Rtn()),
        (METHODS, "smoothquant", {"alpha": "0.6"}, SmoothQuant(alpha=0.6)),
        (METHODS, "smoothquant", {"alpha": 1}, SmoothQuant(alpha=1.0)),
        (METHODS, "quarot", {"seed": "3", "rounding.clip": "mse"}, QuaRot(seed=3, rounding=Rtn("mse"))),
        (METHODS, "quarot", {"rounding": {"clip": "mse"}}, QuaRot(rounding=Rtn("mse"))),
        (POLICIES, "topk", {"density": 0.15, "first_frame": "true"}, TopK(0.15, first_frame=True)),
    ],
)
def test_fields_are_read_from_text_and_from_json(table, name, given, made):
    assert build(table, name, given) == made


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("smooth", {}, "'smooth' is none of none, quarot, rtn, smoothquant"),
        ("smoothquant", {"alhpa": 0.5}, "smoothquant has no field 'alhpa': it has alpha, rounding"),
        ("none", {"alpha": 0.5}, "none has no field 'alpha': it has none"),
        ("smoothquant", {"alpha": "much"}, "smoothquant.alpha is float; got 'much'"),
        ("smoothquant", {"alpha": True}, "smoothquant.alpha is float; got True"),
        ("smoothquant", {"alpha.x": 1}, "smoothquant.alpha has no fields of its own"),
        ("quarot", {"seed": 1.5}, "quarot.seed is int; got 1.5"),
        ("rtn", {"clip": "most"}, "rtn.clip is one of absmax, mse; got 'most'"),
        ("smoothquant", {"alpha": 2}, "alpha lies between 0 and 1; got 2.0"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(name, given, said):
    with pytest.raises(ValueError, match=said):
        build(METHODS, name, given)


def test_a_truth_is_read_as_one():
    with pytest.raises(ValueError, match=r"topk\.first_frame is bool; got 'yes'"):
        build(POLICIES, "topk", {"first_frame": "yes"})
