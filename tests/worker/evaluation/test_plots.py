from __future__ import annotations

import base64
from xml.etree import ElementTree as ET

from worker.evaluation import plots
from worker.evaluation.calibration import Bin
from worker.evaluation.certificate import Certificate
from worker.evaluation.ensembles import Fit, Point
from worker.evaluation.estimates import Estimate
from worker.evaluation.margins import Direction, Histogram, Softened

HALF = Estimate(value=0.5, standard_error=0.1)
BARE = Estimate(value=0.5)


def words(address: str) -> str:
    """Return the text of an image."""
    head, _, data = address.partition(",")
    assert head == "data:image/svg+xml;base64"
    root = ET.fromstring(base64.b64decode(data))
    assert not [each for each in root.iter() if each.tag.endswith(("script", "image"))]
    return " ".join(root.itertext())


def test_every_plot_is_an_image_that_says_what_it_shows() -> None:
    points = [Point(num_prompts=num, cross_entropy=HALF, error=BARE) for num in (1, 2, 5)]
    fit = Fit(a=HALF, b=HALF, r_squared=None, num_prompts=[1, 2, 5])
    assert "prompts per label" in words(plots.prompt_curve(points, fit, "cross_entropy"))
    assert "error" in words(plots.prompt_curve(points, None, "error"))
    assert "top-3" in words(plots.certificates([Certificate(r=3, bound=HALF, shown=0.5, error=HALF)]))
    bins = [
        Bin(lower=0, upper=0.5, num_samples=0, confidence=None, accuracy=None),
        Bin(lower=0.5, upper=1, num_samples=3, confidence=0.7, accuracy=BARE),
    ]
    assert "confidence" in words(plots.reliability(bins))
    softened = [Softened(temperature=t, cross_entropy=HALF, partner_probability=HALF) for t in (0.1, 0.2)]
    assert "trained" in words(plots.by_temperature(softened, 0.1))
    assert "margin" in words(plots.alpha_by_gamma([(-0.1, 0.0), (0.3, 1.0)]))


def test_a_name_is_not_read_as_mathematics_and_the_same_numbers_give_the_same_bytes() -> None:
    direction = Direction(
        source="$x^{",
        target="<b>",
        hardest=HALF,
        mean_negative=HALF,
        positive_share=HALF,
        quantiles={},
        histogram=Histogram(edges=[0.0, 1.0, 2.0], counts=[3, 0]),
    )
    first = plots.margins([direction, direction])
    assert "$x^{ to <b>" in words(first)
    assert plots.margins([direction, direction]) == first
