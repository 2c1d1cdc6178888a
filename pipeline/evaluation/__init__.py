"""How good a trained model is: likelihood, sample quality, memorisation, and the report of it."""

from pipeline.evaluation.config import EvaluationConfig

__all__ = ["EvaluationConfig"]
