"""Whole retrofits: what is run, and how.

``recipe`` says what is run, ``run_stages`` trains its stages, ``quickstart`` is the main job on a small model: data,
base model, conversion, retrofit beside a control, measurement, export, report. ``launch`` is the published recipe for
the scripts in ``launch/``.
"""
