#define DRIVER alpha
#include "driver.h"
