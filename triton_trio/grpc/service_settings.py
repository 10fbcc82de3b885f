"""The logging and trace extensions: settings that operators read and change while the server runs."""

from __future__ import annotations

from .._pb import inference as pb
from ..errors import InvalidArgument, Unavailable, Unsupported
from ..observe.logs import log_settings
from ..server import InferenceServer

#: Log settings that clients may change: the message's field, and how Triton's error text calls its type.
_LOG_TYPES = {
    "log_info": ("bool_param", "boolean"),
    "log_warning": ("bool_param", "boolean"),
    "log_error": ("bool_param", "boolean"),
    "log_verbose_level": ("uint32_param", "int32"),
    "log_format": ("string_param", "string"),
}


def log_settings_rpc(request: pb.LogSettingsRequest) -> pb.LogSettingsResponse:
    """Change what ``request`` has, and answer with everything.

    Nothing is changed if anything is wrong with the request.

    Raises:
      InvalidArgument: a setting of the wrong type, or an unknown one.
      Unsupported: the log file; a client must not choose where the server writes.
      Unavailable: the program around this server has configured ``logging`` by itself.
    """
    settings = log_settings()
    if settings is None:
        raise Unavailable("the server does not support dynamic logging: its program configures Python's logging itself")
    changes = {}
    for name, value in request.settings.items():
        if name == "log_file":
            raise Unsupported("log file location can not be updated through network protocol")
        if name not in _LOG_TYPES:
            raise InvalidArgument(f"unknown log setting '{name}', expected one of {', '.join(_LOG_TYPES)}")
        field, kind = _LOG_TYPES[name]
        change = getattr(value, field)
        if change is None:
            raise InvalidArgument(f"expect {kind} for '{name}'")
        changes[name] = change
    style = changes.get("log_format")
    if style not in (None, "default", "ISO8601", "json"):
        raise InvalidArgument(f"invalid argument for log_format, got: {style}")
    settings.update(
        verbose=changes.get("log_verbose_level"),
        info=changes.get("log_info"),
        warning=changes.get("log_warning"),
        error=changes.get("log_error"),
        style=style,
    )
    setting = pb.LogSettingsResponseSettingValue
    return pb.LogSettingsResponse(
        settings={
            "log_file": setting(string_param=settings.file),
            "log_info": setting(bool_param=settings.info),
            "log_warning": setting(bool_param=settings.warning),
            "log_error": setting(bool_param=settings.error),
            "log_verbose_level": setting(uint32_param=settings.verbose),
            "log_format": setting(string_param=settings.style),
        }
    )


def trace_setting_rpc(server: InferenceServer, request: pb.TraceSettingRequest) -> pb.TraceSettingResponse:
    """Triton's settings, as those of a server that traces nothing.

    Raises:
      NotFound, Unavailable: the model named is not there, or not ready.
      Unsupported: a change.
    """
    if request.model_name:
        server.model(request.model_name)
    if "trace_file" in request.settings:
        raise Unsupported("trace file location can not be updated through network protocol")
    if request.settings:
        names = ", ".join(sorted(request.settings))
        raise Unsupported(f"this server does not trace requests: {names} cannot be changed")
    settings = {
        "trace_level": "OFF",
        "trace_rate": "1000",
        "trace_count": "-1",
        "log_frequency": "0",
        "trace_file": "",
        "trace_mode": "triton",
    }
    return pb.TraceSettingResponse(
        settings={name: pb.TraceSettingResponseSettingValue(value=[value]) for name, value in settings.items()}
    )
