"""Trainings without phases or records, for commands that compare many small networks."""
