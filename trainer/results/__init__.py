"""What a trained model is worth: evaluation, pictures, reports."""
