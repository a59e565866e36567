package store

import (
	"crypto/aes"
	"crypto/cipher"
	"encoding/binary"

	"github.com/zeebo/blake3"
)

// How a pack or document is sealed, as written in its header.
const (
	sealNone   = 0
	sealAESGCM = 1
)

// Contexts of key derivation. Changing one makes every store unreadable.
const (
	contextPack     = "violin store v1: key of one pack"
	contextDocument = "violin store v1: key of documents"
)

// A masterKey encrypts one store. nil means that the store is not encrypted.
type masterKey []byte

// pack returns the cipher of one pack, nil without encryption. Every pack has
// a key of its own, so that an entry's offset is nonce enough and neither
// nonces are stored nor the number of pages a key may seal matters.
func (k masterKey) pack(id packID) cipher.AEAD {
	if k == nil {
		return nil
	}
	return newGCM(contextPack, append(k[:len(k):len(k)], id[:]...))
}

// document returns the cipher of documents, nil without encryption. Their
// nonces are random: there are few of them.
func (k masterKey) document() cipher.AEAD {
	if k == nil {
		return nil
	}
	return newGCM(contextDocument, k)
}

func newGCM(context string, material []byte) cipher.AEAD {
	var key [32]byte
	blake3.DeriveKey(context, material, key[:])
	block, err := aes.NewCipher(key[:])
	if err != nil {
		panic(err) // the length is right
	}
	gcm, err := cipher.NewGCM(block)
	if err != nil {
		panic(err) // AES has GCM's block size
	}
	return gcm
}

// nonce of what begins at a byte offset of a pack.
func nonce(offset uint32) []byte {
	var n [12]byte
	binary.BigEndian.PutUint32(n[8:], offset)
	return n[:]
}
