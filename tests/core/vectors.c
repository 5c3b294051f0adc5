/* simd.h and what micro.c builds on it, for one instruction set and one real, against the same in plain C: built and run by
 * test_isa.py. Prints what is wrong and exits with 1. */
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

#include "simd.h"

#include "families/bfloat16.c"
#include "families/micro.c"

static int faults = 0;

#define EXPECT(condition, ...)                      \
    do {                                            \
        if (!(condition) && faults++ < 20) {        \
            printf("line %d: ", __LINE__);          \
            printf(__VA_ARGS__);                    \
            printf("\n");                           \
        }                                           \
    } while (0)

static const real SPECIAL[] = {0,         -0.0,  1,      -1,    2.5,  -2.5,  INFINITY, -INFINITY, NAN,
                               -(real)NAN, 1e-40, -1e-40, 1e-30, 1e30, -1e30, 87,       -88,       0.3};
enum { N_SPECIAL = sizeof SPECIAL / sizeof SPECIAL[0] };

/* NaN is NaN, whatever its bits, and otherwise the bits count. */
static int same(real a, real b) { return (isnan(a) && isnan(b)) || !memcmp(&a, &b, sizeof a); }

/* Memory that ends where nothing may be touched. */
static real *before_the_end(void) {
    size_t page = sysconf(_SC_PAGESIZE);
    char *pages = mmap(NULL, 3 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED || mprotect(pages, page, PROT_NONE) || mprotect(pages + 2 * page, page, PROT_NONE)) exit(2);
    return (real *)(pages + 2 * page);
}

static void test_some(void) {
    real *end = before_the_end(), *start = end - sysconf(_SC_PAGESIZE) / sizeof(real), x[VL];
    for (ptrdiff_t n = 0; n < VL; n++)
        for (int f = 0; f < N_SPECIAL; f++) {
            for (ptrdiff_t i = 0; i < n; i++) end[i - n] = start[i] = SPECIAL[(f + i) % N_SPECIAL];
            for (int at_start = 0; at_start < 2; at_start++) {
                store(x, load_some(at_start ? start : end - n, n, SPECIAL[f]));
                for (ptrdiff_t i = 0; i < VL; i++)
                    EXPECT(same(x[i], i < n ? SPECIAL[(f + i) % N_SPECIAL] : SPECIAL[f]), "load_some %td, lane %td", n, i);
            }
        }
    for (ptrdiff_t n = 0; n < VL; n++) {
        for (ptrdiff_t i = 0; i < VL; i++) x[i] = i + 1;
        for (ptrdiff_t i = 0; i < 2 * VL; i++) end[i - 2 * VL] = start[i] = -7;
        store_some(end - n, load(x), n);
        store_some(start, load(x), n);
        for (ptrdiff_t i = 0; i < VL; i++) {
            EXPECT(start[i] == (i < n ? i + 1 : -7), "store_some %td, lane %td", n, i);
            EXPECT(end[i - VL] == (i < VL - n ? -7 : i - (VL - n) + 1), "store_some %td before the end, lane %td", n, i);
        }
    }
}

static void test_lanes(void) {
    real a[VL], b[VL], x[VL];
    for (int s = 0; s < N_SPECIAL; s++)
        for (int t = 0; t < N_SPECIAL; t++)
            for (ptrdiff_t at = 0; at < VL; at++) {
                for (ptrdiff_t i = 0; i < VL; i++) a[i] = i + 1, b[i] = 2.5 * i - 3;
                a[at] = SPECIAL[s], b[at] = SPECIAL[t];
                store(x, max_vec(load(a), load(b)));
                for (ptrdiff_t i = 0; i < VL; i++) EXPECT(same(x[i], a[i] > b[i] ? a[i] : b[i]), "max %g %g", (double)a[i], (double)b[i]);
                store(x, min_vec(load(a), load(b)));
                for (ptrdiff_t i = 0; i < VL; i++) EXPECT(same(x[i], a[i] < b[i] ? a[i] : b[i]), "min %g %g", (double)a[i], (double)b[i]);
                store(x, choose(load(a) < load(b), load(a), load(b)));
                for (ptrdiff_t i = 0; i < VL; i++) EXPECT(same(x[i], a[i] < b[i] ? a[i] : b[i]), "choose %g %g", (double)a[i], (double)b[i]);
                /* The order of a fold is part of the promise: halves onto each other. */
                real sum[VL], top[VL];
                memcpy(sum, a, sizeof a), memcpy(top, a, sizeof a);
                for (ptrdiff_t half = VL / 2; half; half /= 2)
                    for (ptrdiff_t i = 0; i < half; i++) {
                        sum[i] += sum[i + half];
                        top[i] = top[i] > top[i + half] ? top[i] : top[i + half];
                    }
                EXPECT(same(sum_lanes(load(a)), sum[0]), "sum_lanes with %g at %td", (double)a[at], at);
                EXPECT(same(max_lanes(load(a)), top[0]), "max_lanes with %g at %td", (double)a[at], at);
            }
    EXPECT(!any_lane(all_lanes(0)) && any_lane(all_lanes(-1)), "any_lane of none, of all");
    for (ptrdiff_t at = 0; at < VL; at++) {
        ivec mask = all_lanes(0);
        mask[at] = -1;
        EXPECT(any_lane(mask), "any_lane of %td", at);
        EXPECT(lane_numbers()[at] == at, "lane_numbers %td", at);
    }
}

/* f(x) within so many halves of its last place; those of `tiny` where it is less. */
static void expect_near(const char *name, double x, double actual, double wanted, double halves, double tiny) {
    double bound = halves * fmax(fabs(wanted), tiny) * (REAL_IS_DOUBLE ? 0x1p-53 : 0x1p-24);
    EXPECT(isinf(wanted) ? actual == wanted : fabs(actual - wanted) <= bound, "%s(%.17g) = %.17g, expected %.17g", name, x, actual, wanted);
}

static void test_functions(void) {
    const double lowest = REAL_IS_DOUBLE ? -708 : -86.98, least = REAL_IS_DOUBLE ? 0x1p-1022 : 0x1p-126;
    enum { STEPS = 200000 };
    for (int step = 0; step <= STEPS; step++) {
        /* One value, in a lane that changes: all the others are something else. */
        ptrdiff_t at = step % VL;
        vec x = all((real)0.1), weight = x, error = x;
        x[at] = (real)(-110 + 220.0 * step / STEPS) * (REAL_IS_DOUBLE ? 7 : 1);
        weight[at] = (real)(lowest * step / STEPS);
        error[at] = (real)(-6 + 12.0 * step / STEPS);
        expect_near("exp", x[at], exp_vec(x)[at], (real)exp(x[at]), 4, least);
        expect_near("exp_weight", weight[at], exp_weight(weight)[at], exp(weight[at]), 4 + 1.5 * fabs(weight[at]), least);
        expect_near("erf", error[at], erf_vec(error)[at], erf(error[at]), 4, least);
    }
    EXPECT(exp_vec(all(0))[0] == 1 && exp_weight(all(0))[0] == 1, "exp(0)");
    EXPECT(exp_vec(all(-INFINITY))[0] == 0 && exp_vec(all(INFINITY))[0] == INFINITY, "exp of infinities");
    EXPECT(same(exp_weight(all(-INFINITY))[0], 0) && same(exp_weight(all(-1e30))[0], 0), "exp_weight far below");
    EXPECT(erf_vec(all(INFINITY))[0] == 1 && erf_vec(all(-INFINITY))[0] == -1, "erf of infinities");
    for (lane payload = 0; payload < 3000; payload++) { /* NaN with bits that an exponent could be made of */
        real nan = NAN;
        lane bits;
        memcpy(&bits, &nan, sizeof bits);
        bits |= payload;
        memcpy(&nan, &bits, sizeof bits);
        EXPECT(isnan(exp_vec(all(nan))[0]) && isnan(exp_weight(all(nan))[0]) && isnan(erf_vec(all(nan))[0]), "NaN %lld", (long long)bits);
    }
    for (real x = (real)(lowest * 1.01); x < lowest * 0.99; x += (real)0.001) {
        real weight = exp_weight(all(x))[0];
        EXPECT(weight == 0 || weight >= (real)least, "exp_weight(%.9g) = %g is not a normal number", (double)x, (double)weight);
    }
}

static void test_transposing(void) {
    enum { ROWS = 2 * VECTOR_BYTES / sizeof(real) + 3, COLUMNS = ROWS + 2, WIDTH = ROWS + 4 };
    real from[ROWS][COLUMNS], to[COLUMNS][WIDTH];
    for (ptrdiff_t rows = 1; rows <= ROWS; rows++)
        for (ptrdiff_t columns = 1; columns <= COLUMNS; columns++) {
            for (ptrdiff_t i = 0; i < ROWS; i++)
                for (ptrdiff_t j = 0; j < COLUMNS; j++) from[i][j] = i * 100 + j;
            for (ptrdiff_t j = 0; j < COLUMNS; j++)
                for (ptrdiff_t i = 0; i < WIDTH; i++) to[j][i] = -7;
            pack_transposed(from[0], COLUMNS, rows, columns, to[0], WIDTH, rows + 1);
            for (ptrdiff_t j = 0; j < COLUMNS; j++)
                for (ptrdiff_t i = 0; i < WIDTH; i++) {
                    real wanted = j >= columns || i > rows ? -7 : i < rows ? i * 100 + j : 0;
                    EXPECT(to[j][i] == wanted, "pack_transposed (%td, %td) at %td, %td", rows, columns, i, j);
                }
        }
}

int main(void) {
    test_some();
    test_lanes();
    test_functions();
    test_transposing();
    if (faults) printf("%d faults\n", faults);
    return faults != 0;
}
