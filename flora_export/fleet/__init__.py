"""Fleets: N adapters times M targets, built, verified and published by workers of a Ray cluster, of this machine or of many."""
