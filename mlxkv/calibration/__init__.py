"""Calibration in one go: from a model and texts to artifacts, in bounded time and memory, and what they are worth."""

from __future__ import annotations

from mlxkv.calibration.budget import Plan as Plan
from mlxkv.calibration.run import DEFAULT_SECONDS as DEFAULT_SECONDS
from mlxkv.calibration.run import Calibration as Calibration
from mlxkv.calibration.run import Reports as Reports
from mlxkv.calibration.texts import Stretches as Stretches
from mlxkv.calibration.texts import cut as cut
from mlxkv.calibration.texts import default_texts as default_texts
from mlxkv.calibration.texts import read_texts as read_texts
