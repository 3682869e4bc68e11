/* CHECK(condition): ends a test program, and says where and what, when something is not so. */

#ifndef CHECK_H
#define CHECK_H

#include <stdio.h>
#include <stdlib.h>

#define CHECK(condition)                                                                  \
	do {                                                                              \
		if (!(condition)) {                                                       \
			printf("%s:%d: not so: %s\n", __func__, __LINE__, #condition);   \
			exit(1);                                                          \
		}                                                                         \
	} while (0)

#endif
