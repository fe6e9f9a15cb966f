#define MOESAIC_VARIANT portable
#include "kernels.hpp"
