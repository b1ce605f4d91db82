"""The engine inspector's JSON for one small net, in the forms of TensorRT 10.x and 11.x.

The net consists of ``conv0`` (INT8, fused with its ReLU), a reformat, ``conv1`` whose
DequantizeLinear runs separately, ``narrow`` with 8 channels, and ``conv3`` with an FP16 kernel. All
convolutions are planned in INT8.
"""

import json

PLANNED = ("conv0", "conv1", "narrow", "conv3", "gone")

_INT8 = "Thirty-two wide channel vectorized row major Int8 format"
_HALF = "Channel major FP16 format where channel % 8 == 0"
_FLOAT = "Row major linear FP32"
_IMAGE, _DEEP, _SLIM = [8, 32, 16, 16], [8, 64, 16, 16], [8, 8, 16, 16]


def _layers(tensor):
    conv = {"ParameterType": "Convolution", "Kernel": [3, 3], "Groups": 1, "StreamId": 0}

    def weights(dtype, count):
        return {"Type": dtype, "Count": count}

    return [
        {
            "Name": "conv0 + relu0",
            "LayerType": "CaskConvolution",
            "Inputs": [tensor("x.q", _IMAGE, "Int8", _INT8)],
            "Outputs": [tensor("r0", _DEEP, "Half", _HALF)],
            **conv,
            "Weights": weights("Int8", 18432),
            "TacticName": "sm80_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32_f32",
            "Metadata": "[ONNX Layer: conv0.weight.dequantize]\x1e[ONNX Layer: conv0]"
            "\x1e[ONNX Layer: relu0]",
        },
        {
            "Name": "Reformatting CopyNode for Input Tensor 0 to conv1",
            "LayerType": "Reformat",
            "Inputs": [tensor("r0", _DEEP, "Half", _HALF)],
            "Outputs": [tensor("r0 copy", _DEEP, "Float", _FLOAT)],
            "ParameterType": "Reformat",
            "Origin": "REFORMAT",
            "Metadata": "[ONNX Layer: conv1]",
        },
        {
            "Name": "r0.dequantize",
            "LayerType": "kgen",
            "Inputs": [tensor("r0 copy", _DEEP, "Int8", _INT8)],
            "Outputs": [tensor("r0.dq", _DEEP, "Float", _FLOAT)],
            "Metadata": "[ONNX Layer: r0.dequantize]",
        },
        {
            "Name": "conv1",
            "LayerType": "CaskConvolution",
            "Inputs": [tensor("r0.dq", _DEEP, "Float", _FLOAT)],
            "Outputs": [tensor("c1", _DEEP, "Float", _FLOAT)],
            **conv,
            "Weights": weights("Float", 36864),
            "TacticName": "sm80_xmma_fprop_implicit_gemm_tf32f32_tf32f32_f32",
            "Metadata": "[ONNX Layer: conv1]",
        },
        {
            "Name": "narrow",
            "LayerType": "CaskConvolution",
            "Inputs": [tensor("c1", _DEEP, "Half", _HALF)],
            "Outputs": [tensor("n", _SLIM, "Half", _HALF)],
            **conv,
            "Weights": weights("Half", 4608),
            "TacticName": "sm80_xmma_fprop_implicit_gemm_f16f16_f16f16_f16",
            "Metadata": "[ONNX Layer: narrow]",
        },
        {
            "Name": "conv3",
            "LayerType": "CaskConvolution",
            "Inputs": [tensor("c1", _DEEP, "Half", _HALF)],
            "Outputs": [tensor("y", _DEEP, "Half", _HALF)],
            **conv,
            "TacticName": "sm80_xmma_fprop_implicit_gemm_f16f16_f16f16_f16",
            "Metadata": "[ONNX Layer: conv3]",
        },
    ]


def version_10() -> str:
    """Return the answer of 10.x; the control character in Metadata is not escaped there."""

    def tensor(name, shape, dtype, layout):
        return {
            "Name": name,
            "Location": "Device",
            "Dimensions": shape,
            "Format/Datatype": layout,
        }

    names = ["x.q [profile 0]", "y", "n"]
    text = json.dumps({"Layers": _layers(tensor), "Bindings": names})
    return text.replace("\\u001e", "\x1e")


def version_10_dynamic() -> str:
    """Return the answer of 10.x when no input shapes were set: types are hidden."""

    def tensor(name, shape, dtype, layout):
        hidden = "N/A due to dynamic shapes"
        return {"Name": name, "Dimensions": [-1, *shape[1:]], "Format/Datatype": hidden}

    return json.dumps({"Layers": _layers(tensor), "Bindings": ["x.q", "y", "n"]})


def version_11() -> str:
    """Return the answer of 11.x."""

    def tensor(name, shape, dtype, layout):
        return {"Name": name, "Dimensions": shape, "Format": layout, "Datatype": dtype}

    def bound(name, mode, shape, dtype):
        return {
            "Name": name,
            "IOMode": mode,
            "DataType": dtype,
            "Dimensions": shape,
            "Location": "Device",
            "IsShapeInferenceIO": False,
            "ProfileInfo": [
                {"MinShape": shape, "OptShape": shape, "MaxShape": shape, "Format": _FLOAT}
            ],
        }

    tensors = [
        bound("x.q", "Input", _IMAGE, "Int8"),
        bound("y", "Output", _DEEP, "Half"),
        bound("n", "Output", _SLIM, "Half"),
    ]
    return json.dumps({"Layers": _layers(tensor), "I/O Tensors": tensors, "Engine Metadata": {}})


def names_only() -> str:
    """Return the answer for an engine that was built without details."""
    return json.dumps({"Layers": ["conv0 + relu0", "conv1"], "Bindings": ["x.q", "y"]})
