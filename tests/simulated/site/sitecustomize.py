"""With this folder and `tests` in PYTHONPATH every Python process has the simulated accelerator, from its start."""

from simulated.device import stand_in

stand_in()
