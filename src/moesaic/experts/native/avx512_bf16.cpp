#define MOESAIC_VARIANT avx512_bf16
#include "kernels.hpp"
