/* Run the functions of a library made of `merge/engine/fused.c` on cases from a file.

   usage: fused_harness LIBRARY CASES RESULTS

   The same program for every machine, so that `tests/engine/test_fused_arm64.py` can compare what they
   write. A case is a `Case` and its arrays, one behind the other. A result is the packed panels of a
   low-rank product, a word of flags, how many bytes beside `out` were written, and `out`. Every
   array ends `offset` bytes before a page that may not be touched: with an offset of 0 the first
   byte read or written behind it ends the program. */

#define _DEFAULT_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { DELTA = 0, PRODUCT = 1, LOW_RANK = 2 };
enum { BEFORE = 64 };

typedef struct {
    int64_t kind, out_dtype, dtypes[3], offset, count, rank, rows, columns;
    double factor;
} Case;

typedef struct {
    int (*version)(void);
    int (*add_delta)(void *, int, const void *, int, const void *, int, const void *, int, float,
                     int64_t);
    int (*add_product)(void *, int, const void *, int, const double *, double, int64_t);
    void (*pack_panels)(double *, const double *, int64_t, int64_t);
    int (*add_low_rank)(void *, int, const void *, int, const double *, const double *, double,
                        int64_t, int64_t, int64_t);
} Library;

typedef struct {
    void *mapping;
    size_t mapped;
    uint8_t *start;
} Fenced;

static void fail(const char *what) {
    fprintf(stderr, "fused_harness: %s\n", what);
    exit(1);
}

static size_t width_of(int64_t dtype) { return dtype == 2 ? 4 : 2; }

static Fenced fenced(size_t size, size_t offset) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    size_t usable = (BEFORE + size + offset + page - 1) / page * page;
    uint8_t *mapping = mmap(NULL, usable + page, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapping == MAP_FAILED || mprotect(mapping + usable, page, PROT_NONE)) fail("no memory");
    memset(mapping, 0x5a, usable);
    return (Fenced){mapping, usable + page, mapping + usable - size - offset};
}

static void drop(Fenced array) { munmap(array.mapping, array.mapped); }

static Fenced read_array(FILE *cases, size_t size, size_t offset) {
    Fenced array = fenced(size, offset);
    if (fread(array.start, 1, size, cases) != size) fail("the cases end within an array");
    return array;
}

static void write_all(FILE *results, const void *from, size_t size) {
    if (fwrite(from, 1, size, results) != size) fail("the results cannot be written");
}

static void *symbol(void *library, const char *name) {
    void *found = dlsym(library, name);
    if (!found) fail(name);
    return found;
}

static void run(const Library *library, const Case *one, FILE *cases, FILE *results) {
    int is_low_rank = one->kind == LOW_RANK;
    size_t count = (size_t)(is_low_rank ? one->rows * one->columns : one->count);
    size_t offset = (size_t)one->offset, out_size = count * width_of(one->out_dtype);
    int out_dtype = (int)one->out_dtype, dtypes[3];
    for (int i = 0; i < 3; i++) dtypes[i] = (int)one->dtypes[i];
    Fenced out = fenced(out_size, offset), inputs[3] = {{0}}, panels = {0};
    inputs[0] = read_array(cases, count * width_of(dtypes[0]), offset);
    int64_t flags, spoilt = 0;
    if (one->kind == DELTA) {
        for (int i = 1; i < 3; i++)
            inputs[i] = read_array(cases, count * width_of(dtypes[i]), offset);
        flags = library->add_delta(out.start, out_dtype, inputs[0].start, dtypes[0],
                                   inputs[1].start, dtypes[1], inputs[2].start, dtypes[2],
                                   (float)one->factor, one->count);
    } else if (one->kind == PRODUCT) {
        inputs[1] = read_array(cases, count * sizeof(double), 0);
        flags = library->add_product(out.start, out_dtype, inputs[0].start, dtypes[0],
                                     (double *)inputs[1].start, one->factor, one->count);
    } else {
        inputs[1] = read_array(cases, (size_t)(one->rows * one->rank) * sizeof(double), 0);
        inputs[2] = read_array(cases, (size_t)(one->rank * one->columns) * sizeof(double), 0);
        size_t size = (size_t)((one->columns + 7) / 8 * 8 * one->rank) * sizeof(double);
        panels = fenced(size, 0);
        library->pack_panels((double *)panels.start, (double *)inputs[2].start, one->rank,
                             one->columns);
        flags = library->add_low_rank(out.start, out_dtype, inputs[0].start, dtypes[0],
                                      (double *)inputs[1].start, (double *)panels.start,
                                      one->factor, one->rank, one->rows, one->columns);
        write_all(results, panels.start, size);
        drop(panels);
    }
    for (int i = 1; i <= BEFORE; i++) spoilt += out.start[-i] != 0x5a;
    for (size_t i = 0; i < offset; i++) spoilt += out.start[out_size + i] != 0x5a;
    write_all(results, &flags, sizeof flags);
    write_all(results, &spoilt, sizeof spoilt);
    write_all(results, out.start, out_size);
    drop(out);
    for (int i = 0; i < 3; i++)
        if (inputs[i].mapping) drop(inputs[i]);
}

int main(int count, char **words) {
    if (count != 4) fail("usage: fused_harness LIBRARY CASES RESULTS");
    void *opened = dlopen(words[1], RTLD_NOW);
    if (!opened) fail(dlerror());
    Library library;
    *(void **)&library.version = symbol(opened, "fused_version");
    *(void **)&library.add_delta = symbol(opened, "fused_add_delta");
    *(void **)&library.add_product = symbol(opened, "fused_add_product");
    *(void **)&library.pack_panels = symbol(opened, "fused_pack_panels");
    *(void **)&library.add_low_rank = symbol(opened, "fused_add_low_rank");
    if (!library.version()) fail("the library does not know this processor");
    FILE *cases = fopen(words[2], "rb"), *results = fopen(words[3], "wb");
    if (!cases || !results) fail("the files cannot be opened");
    Case one;
    while (fread(&one, sizeof one, 1, cases) == 1) run(&library, &one, cases, results);
    if (fclose(results)) fail("the results cannot be written");
    return 0;
}
