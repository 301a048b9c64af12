"""What a run will need and how fast it can go, known before a chip is asked for: `maxlm compile` and `maxlm plan`."""
