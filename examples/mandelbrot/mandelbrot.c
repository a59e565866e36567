/*
 * Mandelbrot: rank 0 hands small blocks of pixels out to the other ranks, all
 * the time, and writes the picture when it has them all. In fixed-point
 * arithmetic, so that every machine computes the same bytes.
 *
 *   mandelbrot [-w width] [-h height] [-n iterations] [-o file.pgm]
 *
 * Built with -DNO_MPI, or started on one rank, it computes everything itself.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#ifndef NO_MPI
#include <mpi.h>
#endif

enum { BLOCK = 64, AHEAD = 3, TAG_WORK = 1, TAG_DONE = 2, FRACTION = 28 };

static int width = 640, height = 480, iterations = 1000;
static const char *output = "mandelbrot.pgm";

static uint8_t pixel(int px, int py) {
	int64_t scale = ((int64_t)3 << FRACTION) / width;
	int64_t cx = px * scale - ((int64_t)9 << FRACTION) / 4;
	int64_t cy = (py - height / 2) * scale;
	int64_t x = 0, y = 0;
	int n = 0;
	while (n < iterations) {
		int64_t xx = (x * x) >> FRACTION, yy = (y * y) >> FRACTION;
		if (xx + yy > (int64_t)4 << FRACTION)
			break;
		y = ((x * y) >> (FRACTION - 1)) + cy;
		x = xx - yy + cx;
		n++;
	}
	return n == iterations ? 0 : 55 + (n * 7) % 200;
}

static int blocks(void) { return (width * height + BLOCK - 1) / BLOCK; }

static void compute(int block, uint8_t *out) {
	for (int i = 0; i < BLOCK; i++) {
		int p = block * BLOCK + i;
		out[i] = p < width * height ? pixel(p % width, p / width) : 0;
	}
}

/* The picture appears whole or not at all. */
static int save(const uint8_t *picture) {
	char part[4096];
	snprintf(part, sizeof part, "%s.part", output);
	FILE *f = fopen(part, "wb");
	if (!f || fprintf(f, "P5\n%d %d\n255\n", width, height) < 0 ||
	    fwrite(picture, 1, (size_t)width * height, f) != (size_t)width * height || fclose(f) || rename(part, output)) {
		perror(output);
		return 1;
	}
	printf("picture %s\n", output);
	fflush(stdout);
	return 0;
}

#ifndef NO_MPI
static void progress(int done) {
	static int shown = -1;
	int percent = (int)((int64_t)done * 100 / blocks());
	if (percent != shown) {
		shown = percent;
		printf("progress %d%%\n", percent);
		fflush(stdout);
	}
}

/* Waiting must leave the processor to those who compute. */
static void await(int from, int tag, MPI_Status *st) {
	int there = 0;
	while (MPI_Iprobe(from, tag, MPI_COMM_WORLD, &there, st), !there)
		usleep(500);
}

static void hand_out(uint8_t *picture, int ranks) {
	int next = 0, done = 0, stop = -1;
	for (int i = 0; i < AHEAD; i++)
		for (int r = 1; r < ranks; r++, next++)
			MPI_Send(next < blocks() ? &next : &stop, 1, MPI_INT, r, TAG_WORK, MPI_COMM_WORLD);
	if (next > blocks())
		next = blocks();
	while (done < blocks()) {
		struct { int32_t block; uint8_t pixels[BLOCK]; } m;
		MPI_Status st;
		await(MPI_ANY_SOURCE, TAG_DONE, &st);
		MPI_Recv(&m, sizeof m, MPI_BYTE, st.MPI_SOURCE, TAG_DONE, MPI_COMM_WORLD, &st);
		memcpy(picture + (size_t)m.block * BLOCK, m.pixels, BLOCK);
		progress(++done);
		MPI_Send(next < blocks() ? &next : &stop, 1, MPI_INT, st.MPI_SOURCE, TAG_WORK, MPI_COMM_WORLD);
		if (next < blocks())
			next++;
	}
}

static void work(void) {
	int left = AHEAD;
	while (left > 0) {
		struct { int32_t block; uint8_t pixels[BLOCK]; } m;
		MPI_Status st;
		await(0, TAG_WORK, &st);
		MPI_Recv(&m.block, 1, MPI_INT, 0, TAG_WORK, MPI_COMM_WORLD, &st);
		if (m.block < 0) {
			left--;
			continue;
		}
		compute(m.block, m.pixels);
		MPI_Send(&m, sizeof m, MPI_BYTE, 0, TAG_DONE, MPI_COMM_WORLD);
	}
}
#endif

int main(int argc, char **argv) {
	int rank = 0, ranks = 1, status = 0;
#ifndef NO_MPI
	MPI_Init(&argc, &argv);
	MPI_Comm_rank(MPI_COMM_WORLD, &rank);
	MPI_Comm_size(MPI_COMM_WORLD, &ranks);
#endif
	for (int c; (c = getopt(argc, argv, "w:h:n:o:")) != -1;)
		switch (c) {
		case 'w': width = atoi(optarg); break;
		case 'h': height = atoi(optarg); break;
		case 'n': iterations = atoi(optarg); break;
		case 'o': output = optarg; break;
		default: fprintf(stderr, "usage: %s [-w width] [-h height] [-n iterations] [-o file.pgm]\n", argv[0]); return 2;
		}
	if (width < 1 || height < 1 || iterations < 1 || width > 32768 || height > 32768) {
		fprintf(stderr, "mandelbrot: width, height and iterations must be positive, and the picture at most 32768 a side\n");
		return 2;
	}
	uint8_t *picture = calloc((size_t)blocks(), BLOCK);
	if (!picture) {
		perror("mandelbrot");
		return 1;
	}
	if (ranks == 1)
		for (int b = 0; b < blocks(); b++)
			compute(b, picture + (size_t)b * BLOCK);
#ifndef NO_MPI
	else if (rank == 0)
		hand_out(picture, ranks);
	else
		work();
#endif
	if (rank == 0)
		status = save(picture);
	free(picture);
#ifndef NO_MPI
	MPI_Finalize();
#endif
	return status;
}
