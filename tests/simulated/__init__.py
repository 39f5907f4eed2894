"""A simulated accelerator, for tests of the accelerator's path where there is none: see `device.cpp`."""
