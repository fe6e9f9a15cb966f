#define MOESAIC_VARIANT avx2
#include "kernels.hpp"
