"""Events as MLflow holds them."""

import inspect
import re

from pipeline.tracking import records
from pipeline.training import events as say

GROUPS = {  # what each metric of a step is shown under
    "loss": "loss",
    "part/error": "part/error",
    "loss_quarter_1": "loss_by_noise/quarter_1",
    "loss_quarter_2": "loss_by_noise/quarter_2",
    "loss_quarter_3": "loss_by_noise/quarter_3",
    "loss_quarter_4": "loss_by_noise/quarter_4",
    "grad_norm": "optimizer/grad_norm",
    "learning_rate": "optimizer/learning_rate",
    "skipped_steps": "optimizer/skipped_steps",
    "rollbacks": "optimizer/rollbacks",
    "images_per_s": "speed/images_per_s",
    "data_wait": "speed/data_wait",
    "tflops": "speed/tflops",
    "mfu": "speed/mfu",
    "peak_memory_gib": "speed/peak_memory_gib",
    "lost_images": "data/lost_images",
}


def test_every_metric_has_its_group() -> None:
    event = say.Step(1, 10, dict.fromkeys(GROUPS, 1.0))
    assert records.metrics(event) == dict.fromkeys(GROUPS.values(), 1.0)
    named = set(re.findall(r"\b[a-z]+(?:_[a-z]+)+\b", (inspect.getdoc(say.Step) or "").split("Keys:")[1]))
    assert {"grad_norm", "data_wait", "lost_images"} <= named & set(GROUPS)


def test_what_is_no_curve_is_left_out() -> None:
    held_out = {"held_out/bits_per_dim": 3.0, "held_out/images": 100.0}
    assert records.metrics(say.Evaluated(1, 10, held_out)) == {"held_out/bits_per_dim": 3.0}
