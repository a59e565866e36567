# A guest for the tests with a real QEMU, in place of the firmware ("-bios").
# It counts, and keeps each of the last 64 counts in a page of its own, so its
# memory agrees with its registers only in a snapshot of one instant: it prints
# "!" where they disagree, and every 65536th count as 8 hex digits and a
# newline, on the first serial port. The bytes are in qemu_test.go.
#
#   as --32 -o guest.o guest.s
#   ld -m elf_i386 --oformat binary -Ttext 0 -e start -o guest.bin guest.o
.code16
.globl start
start:  cli
        xorw %ax,%ax
        movw %ax,%ds
        movw %ax,%ss
        movw $0x7c00,%sp
        xorl %ebx,%ebx
next:   incl %ebx
        movw %bx,%ax            # es = page (count mod 64), from 128 KiB on
        andw $0x3f,%ax
        shlw $8,%ax
        addw $0x2000,%ax
        movw %ax,%es
        cmpl $64,%ebx
        jbe store
        movl %es:0,%eax         # must hold the count of 64 turns ago
        addl $64,%eax
        cmpl %ebx,%eax
        je store
        movb $'!',%al
        call putc
store:  movl %ebx,%es:0
        testw %bx,%bx
        jnz next
        movl %ebx,%ecx
        movw $8,%si
digit:  roll $4,%ecx
        movb %cl,%al
        andb $15,%al
        addb $'0',%al
        cmpb $'9',%al
        jbe out
        addb $39,%al
out:    call putc
        decw %si
        jnz digit
        movb $10,%al
        call putc
        jmp next
putc:   movb %al,%ah
        movw $0x3fd,%dx
1:      inb %dx,%al
        testb $0x20,%al
        jz 1b
        movb %ah,%al
        movw $0x3f8,%dx
        outb %al,%dx
        ret
        .org 0xfff0             # where the processor starts
        ljmp $0xf000, $start
        .org 0x10000
