"""Does a model fit, how many users, how fast at best: arithmetic on the model's shape and the machine's constants."""
