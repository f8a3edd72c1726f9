"""What a run will cost, before it starts: all is checked that can be without training, and two prompts are tried.

prompts.py   the data: how many prompts there are, and whether they fit
amounts.py   samples, tokens, steps
sizes.py     memory and disk
probe.py     two prompts, timed
forecast.py  all of it together
"""

from raftune.planning.forecast import Forecast, forecast

__all__ = ["Forecast", "forecast"]
