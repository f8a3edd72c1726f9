"""Checks a configuration and forecasts its cost, from a trial with two prompts."""

from raftune.planning.forecast import Forecast, forecast

__all__ = ["Forecast", "forecast"]
