"""The promises of the language, each as a property over random graphs, random blocks or random sequences of steps."""
