#define MOESAIC_VARIANT avx512
#include "kernels.hpp"
