/* System headers, included before a target is set: inline functions in them must not be compiled for it. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core.h"
#include "threads.h"
