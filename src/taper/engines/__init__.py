"""Engines that the controller drives; one room per engine."""
