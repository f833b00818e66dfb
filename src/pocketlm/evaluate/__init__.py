"""Evaluation: numbers that say by which protocol they were measured."""
