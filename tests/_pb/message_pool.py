# Generated from protos/codec_torture.proto by protos/generate.py.
# Do not edit: change those, then run `make protos`.
import betterproto2

default_message_pool = betterproto2.MessagePool()
