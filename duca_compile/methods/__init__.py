"""What is made from a model's own loops before it is used: calibrated forecasts and trained predictors."""
