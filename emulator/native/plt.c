/* See plt.h. The slots are those the dynamic linker fills in for JUMP_SLOT relocations (System V ABI, x86-64). */
#define _GNU_SOURCE /* dladdr1() */
#include "plt.h"

#include <dlfcn.h>
#include <elf.h>
#include <errno.h>
#include <link.h>
#include <stdint.h>
#include <string.h>

int plt_redirect(const void *old, const void *new)
{
	const Elf64_Rela *relocations = NULL;
	const Elf64_Sym *symbols = NULL;
	struct link_map *map = NULL;
	uint64_t size = 0;
	Dl_info info;

	if (!dladdr1(old, &info, (void **)&map, RTLD_DL_LINKMAP) || !map)
		return ENOENT;
	for (const Elf64_Dyn *d = map->l_ld; d->d_tag != DT_NULL; d++) {
		if (d->d_tag == DT_JMPREL)
			relocations = (const Elf64_Rela *)d->d_un.d_ptr;
		else if (d->d_tag == DT_PLTRELSZ)
			size = d->d_un.d_val;
		else if (d->d_tag == DT_SYMTAB)
			symbols = (const Elf64_Sym *)d->d_un.d_ptr;
	}
	if (!relocations || !symbols)
		return ENOEXEC;
	for (uint64_t i = 0; i < size / sizeof(*relocations); i++) {
		const Elf64_Sym *symbol = &symbols[ELF64_R_SYM(relocations[i].r_info)];

		if (symbol->st_value && map->l_addr + symbol->st_value == (uintptr_t)old) {
			memcpy((void *)(map->l_addr + relocations[i].r_offset), &new, sizeof(new));
			return 0;
		}
	}
	return ENOENT;
}
