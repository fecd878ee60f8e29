"""What has not been run: formulas beyond one forward, devices, calibrations, forecasts, lifetimes."""
