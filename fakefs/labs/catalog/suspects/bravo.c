#define DRIVER bravo
#include "driver.h"
