/* The least that a restore can be: a static program that makes KVM's calls for one CPU, and nothing else.
 *
 *   floor save STATE MEMORY MIB   runs a guest of its own until it waits for a byte of the serial port, and saves it
 *   floor exec STATE MEMORY MIB   restores it at once
 *   floor cold STATE MEMORY MIB   restores it when a byte comes on standard input
 *   floor warm STATE MEMORY MIB   has made all that does not depend on the state by then
 *   floor parked STATE MEMORY MIB has restored it by then, and lets it run
 *   floor slots STATE MEMORY MIB  says how long KVM takes for the slots of the memory alone, in ns
 *   floor template STATE MEMORY MIB  has read the state by then, and restores it in a copy of itself for each byte
 *
 * A restored guest finds a byte in the serial port, sends it back, which goes to standard output, and halts for
 * good. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { ENTRIES = 256, REGISTERS = 512, XSAVE_MAX = 16384, STACK = 65536 };
enum { DATA = 0x3f8, LINE_STATUS = 0x3fd, READY = 1 };
/* Where what is in the guest's memory, and where it ends. */
enum { PML4 = 0x1000, PDPT = 0x2000, DIRECTORY = 0x3000, CODE = 0x100000, USED = 0x101000 };

struct cpuid { struct kvm_cpuid2 head; struct kvm_cpuid_entry2 entries[ENTRIES]; };
struct registers { struct kvm_msrs head; struct kvm_msr_entry entries[REGISTERS]; };

struct state {
	struct cpuid cpuid;
	struct kvm_irqchip chips[3];
	struct kvm_clock_data clock;
	struct kvm_mp_state run;
	struct kvm_sregs sregs;
	struct kvm_regs regs;
	struct kvm_xcrs xcrs;
	struct kvm_debugregs debug;
	struct kvm_lapic_state lapic;
	struct registers msrs;
	struct kvm_vcpu_events events;
	char xsave[XSAVE_MAX];
};

/* Where memory ends below the devices' addresses, and where it goes on above them. */
static const uint64_t gap = 3ull << 30, gap_end = 4ull << 30;

static struct state state;
static int kvm, vm, cpu;
static size_t size;
static char *memory;
static struct kvm_run *run;
static int is_open, has_rehearsed;

/* Polls the line status, sends back what comes, and halts with interrupts off. */
static const unsigned char guest[] = {
	0x66, 0xba, 0xfd, 0x03, /* again: mov dx, LINE_STATUS */
	0xec,                   /* in al, dx */
	0xa8, 0x01,             /* test al, READY */
	0x74, 0xf7,             /* jz again */
	0x66, 0xba, 0xf8, 0x03, /* mov dx, DATA */
	0xec, 0xee,             /* in al, dx; out dx, al */
	0xfa, 0xf4,             /* cli; hlt */
};

static long must(const char *what, long result)
{
	if (result < 0) {
		fprintf(stderr, "floor: %s: %s\n", what, strerror(errno));
		exit(1);
	}
	return result;
}
#define KVM(fd, request, argument) must(#request, ioctl(fd, request, argument))

static void *map(void *place, int protection, int flags, int fd)
{
	void *mapped = mmap(place, size, protection, flags | MAP_NORESERVE, fd, 0);
	must("mmap", mapped == MAP_FAILED ? -1 : 0);
	return mapped;
}

static void make_vm(void)
{
	uint64_t identity_map = 0xfffbc000;
	kvm = must("open /dev/kvm", open("/dev/kvm", O_RDWR | O_CLOEXEC));
	vm = KVM(kvm, KVM_CREATE_VM, 0);
	KVM(vm, KVM_SET_IDENTITY_MAP_ADDR, &identity_map);
	KVM(vm, KVM_SET_TSS_ADDR, 0xfffbd000);
}

static void add_slots(void)
{
	struct kvm_userspace_memory_region region = { .memory_size = size, .userspace_addr = (uintptr_t)memory };
	if (size > gap)
		region.memory_size = gap;
	KVM(vm, KVM_SET_USER_MEMORY_REGION, &region);
	if (size <= gap)
		return;
	region.slot = 1;
	region.guest_phys_addr = gap_end;
	region.memory_size = size - gap;
	region.userspace_addr += gap;
	KVM(vm, KVM_SET_USER_MEMORY_REGION, &region);
}

static void make_cpu(void)
{
	add_slots();
	KVM(vm, KVM_CREATE_IRQCHIP, 0);
	cpu = KVM(vm, KVM_CREATE_VCPU, 0);
	run = mmap(NULL, KVM(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), PROT_READ | PROT_WRITE, MAP_SHARED, cpu, 0);
	must("map the CPU", run == MAP_FAILED ? -1 : 0);
}

static void show_memory(const char *path, int is_reserved)
{
	int fd = must("open the memory", open(path, O_RDONLY | O_CLOEXEC));
	memory = map(is_reserved ? memory : NULL, PROT_READ | PROT_WRITE, MAP_PRIVATE | (is_reserved ? MAP_FIXED : 0), fd);
	close(fd);
}

static void set_state(void)
{
	for (int chip = 0; chip < 3; chip++)
		KVM(vm, KVM_SET_IRQCHIP, &state.chips[chip]);
	KVM(vm, KVM_SET_CLOCK, &state.clock);
	KVM(cpu, KVM_SET_MP_STATE, &state.run);
	KVM(cpu, KVM_SET_SREGS, &state.sregs);
	KVM(cpu, KVM_SET_REGS, &state.regs);
	KVM(cpu, KVM_SET_XSAVE, state.xsave);
	KVM(cpu, KVM_SET_XCRS, &state.xcrs);
	KVM(cpu, KVM_SET_DEBUGREGS, &state.debug);
	KVM(cpu, KVM_SET_LAPIC, &state.lapic);
	KVM(cpu, KVM_SET_MSRS, &state.msrs);
	KVM(cpu, KVM_SET_VCPU_EVENTS, &state.events);
	/* The guest may have no clock register, which is no failure. */
	ioctl(cpu, KVM_KVMCLOCK_CTRL, 0);
}

/* Goes on after an exit: the byte of the serial port is `byte`, or there is none yet. */
static void answer(char byte)
{
	char *data = (char *)run + run->io.data_offset;
	if (run->exit_reason != KVM_EXIT_IO) {
		fprintf(stderr, "floor: the guest ended: %d\n", run->exit_reason);
		exit(1);
	}
	if (run->io.direction == KVM_EXIT_IO_OUT)
		must("write", write(1, data, 1));
	else
		*data = run->io.port == DATA ? byte : byte ? READY : 0;
}

__attribute__((noreturn)) static void *run_cpu(void *rehearses)
{
	if (rehearses) {
		run->immediate_exit = 1;
		ioctl(cpu, KVM_RUN, 0);
		run->immediate_exit = 0;
		__atomic_store_n(&has_rehearsed, 1, __ATOMIC_RELEASE);
	}
	while (!__atomic_load_n(&is_open, __ATOMIC_ACQUIRE))
		syscall(SYS_futex, &is_open, FUTEX_WAIT_PRIVATE, 0, NULL, NULL, 0);
	for (;;) {
		KVM(cpu, KVM_RUN, 0);
		answer('x');
	}
}

static void start_thread(int rehearses)
{
	pthread_t thread;
	pthread_attr_t attributes;
	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, STACK);
	errno = pthread_create(&thread, &attributes, run_cpu, rehearses ? &state : NULL);
	must("pthread_create", errno ? -1 : 0);
}

static void let_run(void)
{
	__atomic_store_n(&is_open, 1, __ATOMIC_RELEASE);
	syscall(SYS_futex, &is_open, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
	for (;;)
		pause();
}

static void read_state(const char *path)
{
	int fd = must("open the state", open(path, O_RDONLY | O_CLOEXEC));
	must("read the state", read(fd, &state, sizeof state) == sizeof state ? 0 : -1);
	close(fd);
}

static void wait_for_request(void)
{
	char byte;
	if (read(0, &byte, 1) != 1)
		exit(0);
}

/* A file of `whole` bytes that begins with `length` of these. */
static void write_file(const char *path, const void *bytes, size_t length, size_t whole)
{
	int fd = must("make a file", open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600));
	for (size_t at = 0; at < length;)
		at += must("write", write(fd, (const char *)bytes + at, length - at));
	must("ftruncate", ftruncate(fd, whole));
	must("close", close(fd));
}

/* 64-bit mode, the first GiB where it is, in pages of 2 MiB. */
static void load_guest(void)
{
	struct kvm_segment code = { .limit = ~0u, .selector = 8, .type = 11, .present = 1, .s = 1, .l = 1, .g = 1 };
	struct kvm_segment data = { .limit = ~0u, .selector = 16, .type = 3, .present = 1, .s = 1, .db = 1, .g = 1 };
	struct kvm_regs regs = { .rip = CODE, .rflags = 2, .rsp = CODE };
	struct kvm_sregs *sregs = &state.sregs;
	*(uint64_t *)(memory + PML4) = PDPT | 3;
	*(uint64_t *)(memory + PDPT) = DIRECTORY | 3;
	for (uint64_t page = 0; page < 512; page++)
		((uint64_t *)(memory + DIRECTORY))[page] = page << 21 | 0x83;
	memcpy(memory + CODE, guest, sizeof guest);
	KVM(cpu, KVM_GET_SREGS, sregs);
	sregs->cs = code;
	sregs->ds = sregs->es = sregs->fs = sregs->gs = sregs->ss = data;
	sregs->cr0 = 0x80000031;
	sregs->cr3 = PML4;
	sregs->cr4 = 0x20;
	sregs->efer = 0x500;
	KVM(cpu, KVM_SET_SREGS, sregs);
	KVM(cpu, KVM_SET_REGS, &regs);
}

/* All registers that KVM has and takes. */
static void get_registers(void)
{
	struct { struct kvm_msr_list head; uint32_t indices[REGISTERS]; } list = { .head.nmsrs = REGISTERS };
	struct { struct kvm_msrs head; struct kvm_msr_entry entry; } one = { .head.nmsrs = 1 };
	KVM(kvm, KVM_GET_MSR_INDEX_LIST, &list);
	for (uint32_t index = 0; index < list.head.nmsrs; index++) {
		one.entry.index = list.indices[index];
		if (ioctl(cpu, KVM_GET_MSRS, &one) == 1 && ioctl(cpu, KVM_SET_MSRS, &one) == 1)
			state.msrs.entries[state.msrs.head.nmsrs++] = one.entry;
	}
}

static void save(const char *state_path, const char *memory_path)
{
	memory = map(NULL, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	make_vm();
	make_cpu();
	state.cpuid.head.nent = ENTRIES;
	KVM(kvm, KVM_GET_SUPPORTED_CPUID, &state.cpuid);
	KVM(cpu, KVM_SET_CPUID2, &state.cpuid);
	load_guest();
	KVM(cpu, KVM_RUN, 0);
	answer(0);
	/* Ends the instruction. */
	run->immediate_exit = 1;
	ioctl(cpu, KVM_RUN, 0);
	for (uint32_t chip = 0; chip < 3; chip++) {
		state.chips[chip].chip_id = chip;
		KVM(vm, KVM_GET_IRQCHIP, &state.chips[chip]);
	}
	KVM(vm, KVM_GET_CLOCK, &state.clock);
	state.clock.flags = 0;
	KVM(cpu, KVM_GET_MP_STATE, &state.run);
	KVM(cpu, KVM_GET_SREGS, &state.sregs);
	KVM(cpu, KVM_GET_REGS, &state.regs);
	KVM(cpu, KVM_GET_XSAVE, state.xsave);
	KVM(cpu, KVM_GET_XCRS, &state.xcrs);
	KVM(cpu, KVM_GET_DEBUGREGS, &state.debug);
	KVM(cpu, KVM_GET_LAPIC, &state.lapic);
	get_registers();
	KVM(cpu, KVM_GET_VCPU_EVENTS, &state.events);
	write_file(state_path, &state, sizeof state, sizeof state);
	write_file(memory_path, memory, USED, size);
}

static uint64_t now_ns(void)
{
	struct timespec now;
	must("clock_gettime", clock_gettime(CLOCK_MONOTONIC, &now));
	return now.tv_sec * 1000000000ull + now.tv_nsec;
}

static void time_slots(const char *memory_path)
{
	make_vm();
	show_memory(memory_path, 0);
	uint64_t begun = now_ns();
	add_slots();
	printf("%llu\n", (unsigned long long)(now_ns() - begun));
}

int main(int count, char **words)
{
	if (count != 5)
		return 2;
	const char *mode = words[1], *state_path = words[2], *memory_path = words[3];
	int is_warm = !strcmp(mode, "warm"), is_parked = !strcmp(mode, "parked");
	size = strtoull(words[4], NULL, 10) << 20;
	if (!strcmp(mode, "save")) {
		save(state_path, memory_path);
		return 0;
	}
	if (!strcmp(mode, "slots")) {
		time_slots(memory_path);
		return 0;
	}
	if (is_warm) {
		memory = map(NULL, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
		make_vm();
		make_cpu();
		start_thread(1);
		while (!__atomic_load_n(&has_rehearsed, __ATOMIC_ACQUIRE))
			usleep(100);
	}
	if (is_warm || !strcmp(mode, "cold"))
		wait_for_request();
	read_state(state_path);
	if (!strcmp(mode, "template"))
		do
			wait_for_request();
		while (must("fork", fork()));
	if (!is_warm)
		make_vm();
	show_memory(memory_path, is_warm);
	if (!is_warm)
		make_cpu();
	KVM(cpu, KVM_SET_CPUID2, &state.cpuid);
	set_state();
	if (!is_warm)
		start_thread(0);
	if (is_parked)
		wait_for_request();
	let_run();
}
