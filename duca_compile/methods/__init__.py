"""What is made before a loop, from loops of the model: calibrated forecasts and trained predictors."""
