"""Fine-tuning runs: a task as an objective, the saved model, evaluation and prediction."""
