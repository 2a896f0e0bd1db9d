"""The main job on a small model: data, base model, conversion, retrofit beside a control, measurement, export, report.

Read ``recipe`` (what is run), then ``job`` (the steps in order), then what a step calls.
"""
