# Generated from protos/model_config.proto, protos/grpc_service.proto, protos/health.proto by protos/generate.py.
# Do not edit: change those, then run `make protos`.
