#define DRIVER delta
#include "driver.h"
