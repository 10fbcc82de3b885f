# Generated from protos/echo.proto by protos/generate.py.
# Do not edit: change those, then run `make protos`.
