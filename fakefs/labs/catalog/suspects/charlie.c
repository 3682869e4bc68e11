#define DRIVER charlie
#include "driver.h"
