"""The documented tools: data, derivative checks, timing, training, and access to parameters."""

import hessquik.original
from hessquik.utils.checks import (
    directional_derivative_check,
    directional_derivative_laplacian_check,
    input_derivative_check,
    input_derivative_check_finite_difference,
    input_derivative_check_finite_difference_laplacian,
    network_derivative_check,
)
from hessquik.utils.data import peaks
from hessquik.utils.parameters import extract_data, insert_data, module_getattr, module_setattr
from hessquik.utils.taylor import convert_to_base
from hessquik.utils.timing import (
    setup_device_and_gradient,
    setup_fully_connected,
    setup_icnn,
    setup_network,
    setup_resnet,
    timing_test,
    timing_test_cpu,
    timing_test_gpu,
)
from hessquik.utils.training import print_headers, test, train_one_epoch

__all__ = [
    "convert_to_base",
    "directional_derivative_check",
    "directional_derivative_laplacian_check",
    "extract_data",
    "input_derivative_check",
    "input_derivative_check_finite_difference",
    "input_derivative_check_finite_difference_laplacian",
    "insert_data",
    "module_getattr",
    "module_setattr",
    "network_derivative_check",
    "peaks",
    "print_headers",
    "setup_device_and_gradient",
    "setup_fully_connected",
    "setup_icnn",
    "setup_network",
    "setup_resnet",
    "test",
    "timing_test",
    "timing_test_cpu",
    "timing_test_gpu",
    "train_one_epoch",
]

hessquik.original.register(__name__)
