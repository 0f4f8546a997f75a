"""Scores: plain measurements of what a model says and draws, each with an interval and a baseline."""
